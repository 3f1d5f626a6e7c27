"""What `index` does before it writes a manifest. Read in this order:

video_files  the files below a folder: videos, those that cannot be one, and others, counted by their endings
locating     which file is meant by a name in a list, or by a benchmark's id
holding_out  training videos held out for splits that the annotations do not have
probing      the facts of each file, once, and kept in parts for a run that was ended
"""
