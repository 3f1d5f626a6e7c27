"""Reading and re-encoding videos in Ray Data tasks, each in a child process. Read in this order:

    decode_tasks      what a Ray Data task does: read the clips of a chunk of videos
    transcode_tasks   what stage `transcode` runs
    video_process     the child process that decodes, so that a hanging decoder costs one video
    video_requests    what task and child send each other
    video_progress    does that process make progress, or hang
    known_timeouts    which videos timed out, known to all of a job's processes
    encoding          re-encodes one video in the child process

Tasks import neither torch nor mlflow, so nothing is imported here.
"""
