"""Patient-level differentially private training for nnU-Net v2.

The package is the core; nnU-Net enters through two thin doors, :mod:`nnunet_dp.trainers` (classes for
``nnUNetv2_train -tr``) and :mod:`nnunet_dp.postprocessing`. Importing this module imports neither torch nor
nnunetv2, so that the command line answers at once.

Example:
    >>> import nnunet_dp
    >>> nnunet_dp.TRAINER_NAMES[0]
    'nnUNetTrainerDP'
"""

__version__ = "0.1.0"

TRAINER_NAMES: tuple[str, ...] = (
    "nnUNetTrainerDP",
    "nnUNetTrainerDP_AutoS",
    "nnUNetTrainerDP_AutoS_Morph",
    "nnUNetTrainerDP_AutoS_MorphAdaptive",
    "nnUNetTrainerDP_AutoS_MorphTrainingOnly",
    "nnUNetTrainerDP_AutoV",
    "nnUNetTrainerDP_NSGD",
    "nnUNetTrainerDP_PSAC",
    "nnUNetTrainerDP_Quantile",
    "nnUNetTrainerDP_PerLayer",
    "nnUNetTrainerDP_Federated",
)
"""Class names that ``-tr`` accepts: one per clip rule, the plain name clips flat; Morph refines inside the network.

Federated is known to ``nnUNetv2_predict`` alone: its models are trained by ``nnunet-dp fed``."""

FEDERATED_TRAINER = "nnUNetTrainerDP_Federated"
TRAINING_NAMES = tuple(name for name in TRAINER_NAMES if name != FEDERATED_TRAINER)
"""Those that ``nnUNetv2_train`` accepts."""
