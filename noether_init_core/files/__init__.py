"""One checkpoint in any format: open, screen, verify and read it; and make values safe to write.

Nothing here knows a run or a model.
"""
