"""Door 1: the trainers that nnU-Net finds by class name (``nnUNetv2_train ... -tr nnUNetTrainerDP_AutoS``).

The folder holds one module on purpose: nnU-Net imports every module of a trainers folder while it searches,
and one that fails to import ends the search for every other trainer. Algorithms live in the core.
"""
