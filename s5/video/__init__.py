"""Read the frames of a clip from a video file; plain functions without torch or Ray. Read in this order:

clip_times     when the frames of a clip are: pure functions of a seed and an evaluation protocol
reading        probe a video, and read the frames at given times; what other rooms call
reader         the interface of the decoders, and which frame is on screen at a time
decord_reader  fast, and right for most files
pyav_reader    FFmpeg: everything else; also finds out what is in a file

clip_times -> times in seconds -> reading.read_clips -> frames (T, S, S, 3) uint8
"""
