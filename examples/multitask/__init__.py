"""The data of `train_multitask.py`: four real tasks, each read from a published package."""
