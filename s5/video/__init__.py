"""Read the frames of a clip from a video file; plain functions without torch or Ray. Read in this order:

clip_times     when the frames of a clip are: pure functions of a seed and an evaluation protocol
reading        probe a video, and read the frames at given times; what other rooms call
reader         the interface of the decoders, and which frame is on screen at a time
choice         which decoder reads a file: decord where it is proven right, PyAV elsewhere
decord_reader  fast, and right for most files
pyav_reader    FFmpeg: everything else; seeks, and checks that key frames are such
containers/    what is in a file: streams, packets, frames, and what is missing
pictures       how a frame is displayed: turned, mirrored, of square pixels
crops          random resized crops: which part of a picture, and cutting it out of a decoded frame

clip_times -> times in seconds -> reading.read_clips -> frames (T, S, S, 3) uint8
"""
