"""What watches a run: Lightning callbacks that read the module's StepReport and write, show, score or save.

Order matters and is fixed in `fit.py`: metrics are written first, then the evaluation runs, then the checkpoint is
written, then the screen is updated.
"""
