"""Door 2: a folder of predictions in, a refined folder out, in the form of nnU-Net's ``postprocessing.pkl``.

Only the door. Learning the rules (which spends budget) is the core's ``learning``, applying them (which does not) its
``refinement``; ``nnUNetv2_apply_postprocessing`` enters through ``refine_in_nnunet``, which the pickle names.
"""

from nnunet_dp.refined_folder import refine_folder, refine_in_nnunet, write_pickle

__all__ = ["refine_folder", "refine_in_nnunet", "write_pickle"]
