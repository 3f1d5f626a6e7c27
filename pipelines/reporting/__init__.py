"""What a report says of runs: tables and figures, as Markdown, as text for a terminal, and as one page of HTML.

Read in this order:

    table       a table with its figures, and how values are written
    seeds       which runs differ in nothing but their seed, and the interval over them
    by_stage    tables of stages: results, learning curves, settings that differ, means over seeds
    by_sweep    tables of sweeps: trials, means over seeds, gain or loss of masking
    tradeoffs   accuracy against the share of tokens kept, speed and memory
    beside      the paper's published rows beside ours
    page        the page, from page.html
"""
