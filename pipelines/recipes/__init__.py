"""What a recipe consists of. Read in this order:

steps      the stages that run, with their settings and folders
compatibility  whether the settings of the stages work together
published  the tables of the paper and its peers
row        our row beside them, with mean and interval over seeds
counts     clips, steps and tokens of each stage, from annotations alone
rates      measured rates of nodes, and what they are of
costs      what each stage would cost, from counts and rates
dry_run    the costs as a text
"""
