"""Door 2: a folder of predictions in, a refined folder out, in the form of nnU-Net's ``postprocessing.pkl``.

Only the door: learning the operations (which spends budget) and applying them (which does not) belong to the
core's morphology, which fills this package.
"""
