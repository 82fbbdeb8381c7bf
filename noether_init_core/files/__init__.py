"""One checkpoint, whatever it is stored as: opened, screened, verified, read. Nothing here knows a run or a model."""
