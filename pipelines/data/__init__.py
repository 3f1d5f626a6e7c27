"""From annotations and videos to batches of clips. Read in this order:

    annotations/      what is known of the videos: own csv files and folders, and the benchmarks' formats
    indexing/         files below a folder, the files that lists mean, and their facts
    manifest          the table that all later stages share, one row per video, and its checks
    protocols         which clips of each video a benchmark trains on and evaluates
    clip_order        which video is trained on in which step, computed from the seed in advance
    clip_source       the interface of what delivers batches in that order, with two implementations:
      clip_batches      decodes frames in Ray Data tasks
      features/         cached features, and what reads them in threads
    decoding/         what the tasks of Ray Data do: read clips, or re-encode videos, in a child process
    rendering         draws one video of the sample data set

    annotations + videos -> manifest -> clip order -> clip source -> `s5.batch.ClipBatch` -> training

A video that cannot be read never ends a run: it is counted, listed with its reason, and replaced in training.
Decode tasks import neither torch nor mlflow, so nothing is imported here.
"""
