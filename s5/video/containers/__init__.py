"""What is in a video file: its streams, packets and frames, and what is missing of them. Read in this order:

opening  open a file, and choose its video stream
frames   FFmpeg's frames in order, each with its time; lost and damaged ones are known
scan     what is in a file, from its packets, or from its frames where packets do not say it
packets  what the bytes of a packet say: hidden frames, key frames, holes
outline  is a file fragmented, or were several joined byte by byte
asf      which pictures of a wmv file are not there whole
"""
