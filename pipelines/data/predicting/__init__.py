"""Predictions of videos, for stage `predict`. Read in this order:

rows     a prediction as a row of a table, a line of JSON and a row on a terminal
summary  what the stage prints of rows, and what they come to
worker   predicts videos one after another, each read by a child process
cluster  workers as actors of Ray Data
overlay  a video with the tokens dimmed that S5 drops, and frames for a contact sheet
"""
