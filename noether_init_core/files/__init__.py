"""One checkpoint, whatever it is stored as: opened, screened, verified, read; and values made safe to be written.

Nothing here knows a run or a model.
"""
