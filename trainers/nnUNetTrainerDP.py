"""The private trainers: class names for ``-tr`` and the overrides by which nnU-Net's loop becomes DP-SGD.

Nothing here is an algorithm. ``nnUNetTrainerDP`` asks the core for a private plan, a run, a loader and a
``PrivateTraining``, and tells nnU-Net's loop when to call them; the subclasses name a clip rule each.

    nnUNetv2_train 4 3d_fullres 0 -tr nnUNetTrainerDP_AutoS -p nnUNetPlansDP_eps8

Design note: nnU-Net imports this file under several names and drops it from ``sys.modules``; whatever crosses a process
or a checkpoint therefore lives in the core. Attributes hold public facts only: nnU-Net prints them to disk.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from time import time

import numpy as np
import torch
from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter
from batchgenerators.utilities.file_and_folder_operations import load_json, save_json
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from torch._dynamo import OptimizedModule

from nnunet_dp import description, nnunet
from nnunet_dp import plans as private_plans
from nnunet_dp.admission import refuse_coupling
from nnunet_dp.charges import epsilon_of
from nnunet_dp.clipping import RULE_NAMES
from nnunet_dp.dpsgd import Execution, PrivateTraining
from nnunet_dp.engine_choice import execution_for
from nnunet_dp.errors import Refusal, UsageRefusal
from nnunet_dp.learning import ballot_for, boxes_around, learn_once, own_rules, reference_facts
from nnunet_dp.ledger import Ledger
from nnunet_dp.loading import PatientLoader
from nnunet_dp.morphology import FILE
from nnunet_dp.nnunet_cases import CaseReader, refuse_unusable
from nnunet_dp.nnunet_planning import self_configured
from nnunet_dp.nnunet_start import ensure_start
from nnunet_dp.patients import Patients
from nnunet_dp.process_group import FIRST, ProcessGroup, device_type, is_shared
from nnunet_dp.public_start import PROVENANCE
from nnunet_dp.ranks import Alone, Follower, Leader
from nnunet_dp.report import banner, plot_spending
from nnunet_dp.run import FINAL, LATEST, RunFolder, read_checkpoint, write_checkpoint
from nnunet_dp.soft_morphology import MorphedNetwork, SoftMorphology
from nnunet_dp.splits import fold_slots
from nnunet_dp.unusable import EmptyWhereUnusable, target_shapes
from nnunet_dp.workers import in_tenths

IN_NETWORK = (None, "fixed", "adaptive", "training_only")  # morphology of the logits

_AFTER_A_FAULT = (
    "Look at disk space and permissions of nnUNet_preprocessed and nnUNet_results (`nnunet-dp doctor`). What was "
    "charged stays charged; the same command with --c goes on, without --c where nothing was trained yet."
)


def _refuse_cleanly(method):
    """Under nnUNetv2_train a refusal ends with its message and exit code instead of a traceback."""

    @functools.wraps(method)
    def wrapper(self, *args, **kwargs):
        try:
            return method(self, *args, **kwargs)
        except Refusal as refusal:
            if not nnunet.calling_options().from_command_line:
                raise
            print(f"\nnnunet_dp refuses: {refusal}", file=sys.stderr, flush=True)
            raise SystemExit(refusal.exit_code) from None
        except OSError as error:  # a full disk, mostly; its file may be named after a case
            if not nnunet.calling_options().from_command_line:
                raise
            reason = error.strerror or type(error).__name__
            print(f"\nnnunet_dp stops: {reason}. {_AFTER_A_FAULT}", file=sys.stderr, flush=True)
            raise SystemExit(1) from None
        except KeyboardInterrupt:
            if not nnunet.calling_options().from_command_line:
                raise
            print("\nStopped. What was charged stays charged; the same command with --c goes on.", file=sys.stderr)
            raise SystemExit(130) from None

    return wrapper


class nnUNetTrainerDP(nnUNetTrainer):
    """nnU-Net with patient-level DP-SGD, flat clipping.

    Formal guarantee:
        The averaged weights in ``checkpoint_final.pth`` are (epsilon, delta)-differentially private per unit, given the
        plans, under the zero-out relation, with epsilon computed from ``privacy_ledger.jsonl``; see ``not_covered``.
    """

    clip_rule = "flat"
    in_network: str | None = None
    validation_batches = 4
    validation_batch_size = 8

    @_refuse_cleanly
    def __init__(self, plans, configuration, fold, dataset_json, device=torch.device("cuda")):  # noqa: B008
        self._group = ProcessGroup() if is_shared() else None
        self._ranks = Leader(self._group) if self._leads else Alone()
        if self._follows:
            self._group.wait()  # until the leader has made what all read, and refused what all would refuse
        options = nnunet.calling_options()
        self._refuse_options(options, device)
        description.checked(dataset_json)
        if private_plans.read_section(plans) is None:
            continue_training = plans.get("continue_training", False)
            ordinary = {key: value for key, value in plans.items() if key != "continue_training"}
            plans = self_configured(ordinary, configuration, dataset_json)
            plans["continue_training"] = continue_training
        plans = deepcopy(plans)
        plans.setdefault("continue_training", False)
        self.continuing = plans["continue_training"]
        self.section = private_plans.read_section(plans)
        self.private_plan = private_plans.configuration_plan(self.section, configuration)
        self._refuse_weights(options)
        super().__init__(plans, configuration, fold, dataset_json, device)
        self._leave_ddp()
        self.grad_scaler = None  # it would skip steps on un-noised infinities
        self.configuration_manager.configuration["batch_dice"] = False  # a batch's Dice would couple patients
        if self.is_cascaded:
            raise Refusal("the cascade's second stage is not supported: train 3d_fullres or 3d_lowres")
        if len(self.configuration_manager.pool_op_kernel_sizes) < 3:
            self.enable_deep_supervision = False  # nnU-Net gives the last output no weight: with one, 0 / 0
        self.initial_lr = self.private_plan.clip_rules[self.clip_rule].learning_rate
        self.weight_decay = 0.0
        self.num_iterations_per_epoch = max(1, self.private_plan.steps // 20)  # an epoch is at most 5 % of the steps
        self.num_val_iterations_per_epoch = self.validation_batches
        self.num_epochs = math.ceil(self.private_plan.steps / self.num_iterations_per_epoch)
        self.private: PrivateTraining | None = None
        self._resume: dict | None = None
        self._radii = None
        self._only_weights = False
        if self._leads:
            self._group.wait()

    @property
    def _follows(self):
        return self._group is not None and self._group.rank != FIRST

    @property
    def _leads(self):
        return self._group is not None and self._group.rank == FIRST

    def _leave_ddp(self):
        """Not nnU-Net's way with several GPUs: DDP, a part of the batch each, losses that see other ranks' patients."""
        if self._group is not None:
            self.device = torch.device("cuda", self._group.rank) if device_type() == "cuda" else torch.device("cpu")
            self.is_ddp = False

    # ---- refusals, all before the first charge -----------------------------------------------------------------

    def _refuse_options(self, options, device):
        if os.getenv("nnUNet_wandb_enabled", "0") not in ("0", "False", "false"):
            raise Refusal("nnUNet_wandb_enabled uploads plans and Dice of private data: unset it")
        if device.type not in ("cpu", "cuda"):
            raise Refusal(f"-device {device.type} has no float64, in which gradients are summed: use cuda or cpu")
        if options.val_with_best:
            raise Refusal("--val_best needs checkpoint_best, which is chosen on private validation data: leave it out")
        if options.disable_checkpointing:
            raise Refusal("--disable_checkpointing would lose charged steps in a crash: leave it out")

    def _refuse_weights(self, options):
        if options.pretrained_weights is None:
            return
        if nnunet.file_sha256(options.pretrained_weights) != self.section.public_weights_sha256:
            raise Refusal(
                "-pretrained_weights names a file that the plan does not declare public: if it was trained without "
                "any of these patients, plan with `nnunet-dp plan ... --public-weights FILE`"
            )

    def _refuse_changes(self):
        """Refuse what happened behind the trainer's back between construction and training."""
        if self.disable_checkpointing:
            raise Refusal("disable_checkpointing would lose charged steps in a crash")
        self._refuse_overrides()
        refuse_coupling(self._module())
        if self._initial_digest != _weights_digest(self._module()) and not self._weights_declared():
            raise Refusal("the network's weights were changed before training: declare public weights in the plan")
        saved = Path(self.output_folder_base) / "plans.json"
        mine = private_plans.for_one_configuration(self.plans_manager.plans, self.configuration_name)
        if saved.is_file():
            theirs = private_plans.for_one_configuration(load_json(str(saved)), self.configuration_name)
            if theirs != mine:
                raise Refusal(
                    f"{saved.parent.name} holds folds of a different plan: give the new plan a name of its own "
                    "(`nnunet-dp plan ... -o NAME`), or move that folder away"
                )

    def _refuse_overrides(self):
        """A subclass may name a clip rule and nothing else: no custom loss or step was examined."""
        order = type(self).__mro__
        own = order.index(nnUNetTrainerDP)
        if order[own + 1] is not nnUNetTrainer:
            raise Refusal(f"{type(self).__name__} mixes in {order[own + 1].__name__}: it was never examined")
        allowed = {"clip_rule", "in_network", "__module__", "__doc__", "__qualname__"}
        allowed |= {"__firstlineno__", "__static_attributes__"}
        changed = {name for kind in order[:own] for name in vars(kind)} - allowed
        for kind in order[: own + 1]:  # plain words, no properties: nothing of a subclass runs
            for name, words in (("clip_rule", RULE_NAMES), ("in_network", IN_NETWORK)):
                if name in vars(kind) and vars(kind)[name] not in words:
                    changed.add(name)
        changed |= {name for name, value in vars(self).items() if callable(value) and hasattr(type(self), name)}
        if changed:
            raise Refusal(f"{type(self).__name__} overrides {', '.join(sorted(changed))}: it was never examined")

    def _weights_declared(self):
        return nnunet.calling_options().pretrained_weights is not None  # its hash was compared in __init__

    # ---- network, loss, data -----------------------------------------------------------------------------------

    @_refuse_cleanly
    def initialize(self):
        """nnU-Net's own; remembers the weights, which nothing may change before training."""
        super().initialize()
        if self.in_network in ("fixed", "training_only"):
            dimensions = len(self.configuration_manager.patch_size)
            self._open_logits([(1,) * dimensions] * self._heads())  # k = 3, as published
        self._initial_digest = _weights_digest(self._module())

    @classmethod
    def build_network_architecture(cls, plans_manager, configuration_manager, num_input_channels, num_output_channels,
                                   enable_deep_supervision=True):  # fmt: skip
        """nnU-Net's network, at training and at prediction; that of the Morph trainers is wrapped."""
        network = nnUNetTrainer.build_network_architecture(
            plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision
        )
        if cls.in_network is None:
            return network
        dimensions = len(configuration_manager.patch_size)
        morphology = SoftMorphology(num_output_channels, dimensions, cls.in_network != "training_only")
        return MorphedNetwork(network, morphology)  # the identity until radii are chosen, or loaded with the weights

    def configure_optimizers(self):
        """nnU-Net asks for both; the step's own optimizer and schedule are the core's."""
        optimizer = torch.optim.SGD(self.network.parameters(), self.initial_lr)
        return optimizer, PolyLRScheduler(optimizer, self.initial_lr, self.num_epochs)

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self):
        """As nnU-Net's; without augmentation there is no mirroring, at training and at prediction."""
        rotation, dummy_2d, initial, mirror_axes = super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        if self.private_plan.augmentation == "none":
            self.inference_allowed_mirroring_axes = mirror_axes = None
            initial = self.configuration_manager.patch_size
        return rotation, dummy_2d, initial, mirror_axes

    def _patients(self) -> Patients:
        return nnunet.patients_of_plan(Path(self.preprocessed_dataset_folder_base), self.section)

    def _slots(self):
        """Training slots and validation cases of this fold: public, fixed before any image is read."""
        folder = Path(self.preprocessed_dataset_folder_base)
        patients = self._patients()
        splits = [] if self.fold == "all" else nnunet.find_splits(folder, patients)
        return fold_slots(splits, self.fold, patients)

    def do_split(self):
        """Cases of the fold, split by patient."""
        slots, validation = self._slots()
        return [case for cases in slots.values() for case in cases], validation

    def get_dataloaders(self):
        """Our loader of drawn patients for training, nnU-Net's own for the local online validation."""
        dataset_tr, dataset_val = self.get_tr_and_val_datasets()
        slots, _ = self._slots()
        patch_size, scales = self.configuration_manager.patch_size, self._get_deep_supervision_scales()
        rotation, dummy_2d, initial, mirror = self.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        labels = self.label_manager
        regions = labels.foreground_regions if labels.has_regions else None
        plain = self.get_validation_transforms(scales, False, labels.foreground_labels, regions, labels.ignore_label)
        transforms = plain
        if self.private_plan.augmentation == "nnunet":
            transforms = self.get_training_transforms(
                patch_size, rotation, scales, mirror, dummy_2d, self.configuration_manager.use_mask_for_norm,
                False, labels.foreground_labels, regions, labels.ignore_label,
            )  # fmt: skip
        source = nnunet.PatchSource(
            dataset_tr, self.private_plan.patches_per_patient, initial, patch_size, labels,
            self.oversample_foreground_percent, transforms,
        )  # fmt: skip
        source = self._never_failing(source, scales)
        source.refuse_fault(next(iter(slots.values())))
        loader = PatientLoader(source, list(slots.values()), self.device, get_allowed_n_proc_DA())
        validation = nnUNetDataLoader(
            dataset_val, self.validation_batch_size, patch_size, patch_size, labels,
            self.oversample_foreground_percent, transforms=plain,
        )  # fmt: skip
        return loader, SingleThreadedAugmenter(validation, None)

    def _never_failing(self, source, scales):
        """After a charge no error tells of one patient; what was unusable before was refused."""
        count, labels = self.private_plan.patches_per_patient, self.label_manager
        patch = self.configuration_manager.patch_size
        ignored = [] if labels.ignore_label is None else [labels.ignore_label]
        known = None if labels.has_regions else {0, *labels.foreground_labels, *ignored}
        targets = target_shapes(count, nnunet.target_channels(labels), patch, scales)
        return EmptyWhereUnusable(source, (count, self.num_input_channels, *patch), targets, known)

    # ---- the loop ----------------------------------------------------------------------------------------------

    @_refuse_cleanly
    def on_train_start(self):
        """nnU-Net's own, without the raw fingerprint's copy, and with the run, the ledger and the banner."""
        if not self.was_initialized:
            self.initialize()
        self._refuse_changes()
        run = RunFolder(
            Path(self.output_folder),
            Path(self.preprocessed_dataset_folder_base) / nnunet.LEDGER,
            nnunet.results_folder(self.plans_manager.dataset_name),
        )
        run.lock()
        slots, validation = self._slots()
        cases = {case for cases in slots.values() for case in cases} | set(validation)
        nnunet.refuse_missing(self.dataset_class, Path(self.preprocessed_dataset_folder), cases)
        self.dataset_class.unpack_dataset(self.preprocessed_dataset_folder, overwrite_existing=False, verify=True)
        self._refuse_unusable(cases)
        plan = self.private_plan.privacy_plan(self.section.budget, self.clip_rule, len(slots))
        plan.verify()
        nnunet.refuse_unpaid_fingerprint(run.dataset_ledger, self.private_plan)
        if self._leads:
            self._ranks.agree(self._facts(plan, slots))
            self.print_to_log_file(f"{self._group.size} processes share each step; the first one charges and noises.")
        self._refuse_early(run, slots, plan)
        provenance = self._begin_from_public_start()
        self._start(run, slots, plan, provenance)
        self.dataloader_train, self.dataloader_val = self.get_dataloaders()
        self.set_deep_supervision_enabled(self.enable_deep_supervision)
        self._write_model_files()
        self._banner(len(slots))
        self._learn_morphology(slots)
        if self._leads:
            self._ranks.begin(self._radii, self._module())
        self._started = time(), self.private.step

    def _refuse_unusable(self, cases):
        """Cases that would end the training after its first charge."""
        folder, base = Path(self.preprocessed_dataset_folder), Path(self.preprocessed_dataset_folder_base)
        references = base / "gt_segmentations"
        reader = CaseReader(self.dataset_class, folder, references, self.dataset_json, self.plans_manager.plans)
        refuse_unusable(reader, cases, get_allowed_n_proc_DA(), in_tenths(self.print_to_log_file, "cases read"))

    def _begins_from_public_start(self):
        """A run that goes on has its own weights."""
        return self._resume is None and self.private_plan.start is not None

    def _refuse_early(self, run, slots, plan):
        """What ``_start`` would refuse, before half an hour goes into a public start; nothing is charged."""
        if not self._begins_from_public_start():
            return
        patients = self._patients()
        run.verify_ledger()
        Ledger(run.dataset_ledger, run.name, plan.digest(), None, patients.unit, patients.table_sha256)
        if self.continuing:  # opens the run only where this fold was never charged: no older run to archive
            self._open(run, plan)
        if plan.morphology is not None:  # classes that cannot be refined are refused
            noise = plan.morphology.noise_multiplier
            ballot_for(self.dataset_json, self.configuration_manager.spacing, len(slots), noise)

    def _begin_from_public_start(self):
        """Load what the network learnt from phantoms, made now if nobody has; how it came about, for ``_start``."""
        if not self._begins_from_public_start():
            return None
        weights, provenance = ensure_start(
            self.plans_manager.plans, self.configuration_name, self.dataset_json,
            Path(self.preprocessed_dataset_folder_base), self.device, get_allowed_n_proc_DA(), self.print_to_log_file,
        )  # fmt: skip
        network = self._module()
        (network.network if self.in_network else network).load_state_dict(weights)
        return provenance

    def _open(self, run, plan):
        """The run's ledger; an older model of the fold is archived."""
        patients = self._patients()
        unit, units = patients.unit, patients.table_sha256
        if self._resume:
            return run.resume(self._resume, unit, units)
        ledger = run.start(plan.digest(), self.continuing, Path(self.log_file), unit, units)
        if run.archived:
            self.print_to_log_file(
                f"An older model of this fold was moved to {run.archived}; its charges stay (--c would have gone on)."
            )
        return ledger

    def _start(self, run, slots, plan, provenance):
        """Open the run and write its first checkpoint; from then on nothing that could be refused is left to do."""
        ledger = self._open(run, plan)
        if provenance is not None:
            save_json(provenance, str(Path(self.output_folder) / PROVENANCE), sort_keys=False)
        schedule = self.private_plan.schedule(self.clip_rule)
        execution = replace(self._execution(plan), ranks=self._ranks)
        self.private = PrivateTraining(self.network, self.loss, plan, schedule, execution, ledger)
        self._data_digest = nnunet.data_digest(Path(self.preprocessed_dataset_folder), slots, self.private_plan)
        if self._resume:
            self.private.restore(self._resume, self._data_digest)
            self._resume = None
        self._save_latest()  # before the first charge: whatever dies from here on can be continued

    def _execution(self, plan) -> Execution:
        share = plan.expected_batch / (self._group.size if self._group else 1)
        autocast = functools.partial(nnunet.autocast, self.device)
        return execution_for(self.device, autocast, plan.steps, share, self.print_to_log_file)

    def _learn_morphology(self, slots):
        """Once per run, before its first step: how to refine, from the masks, for the plan's share of the budget."""
        facts = reference_facts(
            Path(self.preprocessed_dataset_folder_base), slots, self.plans_manager.plans, self.dataset_json,
            self.configuration_name, get_allowed_n_proc_DA(),
        )  # fmt: skip
        fold, training = Path(self.output_folder), self.private
        self.print_to_log_file(learn_once(fold, training.plan, training.ledger, facts, training.checkpoint))
        if self.in_network == "adaptive":
            rules = own_rules(fold, training.ledger)  # only what this run's own charge paid for
            radii = boxes_around(rules, self.configuration_manager.spacing) if rules else None
            if self._radii is not None and self._radii != radii:  # of the checkpoint that is continued
                raise Refusal(f"{FILE} in {fold.name} is not the one this run began with: put it back from a backup")
            self._radii = radii
            if radii is not None:
                self._open_logits(radii)
            self._save_latest()

    def _heads(self):
        return self.label_manager.num_segmentation_heads - (not self.label_manager.has_regions)

    def _open_logits(self, radii):
        """An opening of each foreground class's logits, radii in voxels [classes][dimensions]."""
        background = [] if self.label_manager.has_regions else [(0,) * len(radii[0])]
        network, boxes = self._module(), [*background, *radii]
        morphology = SoftMorphology(
            len(boxes), len(boxes[0]), self.in_network != "training_only", over_background=bool(background)
        )
        morphology.set_radii(boxes, ["opening" if any(box) else "none" for box in boxes])
        network.morphology = morphology.to(self.device)

    def _write_model_files(self):
        folder = Path(self.output_folder_base)
        plans = private_plans.without_patients_digest(self.plans_manager.plans)
        save_json(plans, str(folder / "plans.json"), sort_keys=False)
        save_json(nnunet.public_dataset_json(self.dataset_json), str(folder / "dataset.json"), sort_keys=False)
        save_json({}, str(folder / "dataset_fingerprint.json"))  # a stub: nnU-Net's tools look for the file

    def _banner(self, units):
        precision = "bfloat16" if nnunet.fast_bfloat16(self.device) else "float32"
        spent, total = self._spent(), self._spent(whole_dataset=True)
        text = banner(self.section, self.configuration_name, units, self.clip_rule, precision, spent, total)
        self.print_to_log_file(text, add_timestamp=False)

    def _spent(self, whole_dataset=False):
        ledger = self.private.ledger
        entries = ledger.entries if whole_dataset else [*self.private_plan.paid, *ledger.own_entries]
        return epsilon_of(entries, self.section.budget.delta)

    @_refuse_cleanly
    def run_training(self):
        """nnU-Net's loop over epochs of a few private steps, until the schedule or the budget ends."""
        if self._group is not None:
            self._only_weights = self._group.said(self._only_weights)
        if self._only_weights:
            self.print_to_log_file("This training is finished; nothing is left to continue.")
            return
        if self._follows:
            self._follow()
            return
        self.on_train_start()
        while not self.private.finished:
            self.on_epoch_start()
            self.on_train_epoch_start()
            outputs = []
            for _ in range(self.num_iterations_per_epoch):
                if not self.private.finished:
                    outputs.append(self.train_step({}))
            self.on_train_epoch_end(outputs)
            with torch.no_grad():
                self.on_validation_epoch_start()
                batches = range(self.num_val_iterations_per_epoch)
                self.on_validation_epoch_end([self.validation_step(next(self.dataloader_val)) for _ in batches])
            self.on_epoch_end()
        self.on_train_end()
        if self._leads:
            self._ranks.finish(self._module())

    def _facts(self, plan, slots):
        """What all processes must see alike: rank 1 must not know another patient under a slot's number."""
        data = nnunet.data_digest(Path(self.preprocessed_dataset_folder), slots, self.private_plan)
        in_order = private_plans.json_sha256([[slot, list(cases)] for slot, cases in slots.items()])
        return type(self).__name__, plan.digest(), data, in_order

    def _follow(self):
        """A training in any process but the first: its share of each step's patients, and nothing else."""
        if not self.was_initialized:
            self.initialize()
        follower = Follower(self._group)
        follower.wait()
        self._refuse_changes()
        slots, _ = self._slots()
        plan = self.private_plan.privacy_plan(self.section.budget, self.clip_rule, len(slots))
        follower.agree(self._facts(plan, slots))
        radii = follower.begin()
        if radii is not None:
            self._open_logits(radii)
        loader, _ = self.get_dataloaders()
        self.set_deep_supervision_enabled(self.enable_deep_supervision)
        self.network.train()
        follower.serve(self._module(), self._execution(plan).clip(self.network, self.loss, loader.records, plan.rule))
        loader.close()

    def on_train_epoch_start(self):
        """Training mode, and the learning rate of the epoch's first step into nnU-Net's log."""
        self.network.train()
        rate = self.private.schedule.learning_rate_at(self.private.step, self.private.plan.steps)
        self.logger.log("lrs", rate, self.current_epoch)

    def train_step(self, batch):
        """One private step; the batch is drawn inside, after it was charged."""
        if not Path(self.preprocessed_dataset_folder).is_dir():  # every case would count as nothing
            raise Refusal("the preprocessed data are gone: bring the disk back, then continue with --c")
        losses: list[torch.Tensor] = []
        self.private.advance(self.dataloader_train.records, losses.append)
        return {"loss": float(torch.stack(losses).mean()) if losses else float("nan")}

    def on_train_epoch_end(self, train_outputs):
        """Mean local loss of the epoch; an epoch of empty draws repeats the last one."""
        losses = [output["loss"] for output in train_outputs if math.isfinite(output["loss"])]
        previous = self.logger.get_value("train_losses", None)
        fallback = previous[-1] if previous else 0.0
        self._loss_text = f"{np.mean(losses):.4f}" if losses else "not finite: nothing is learnt"
        self.logger.log("train_losses", float(np.mean(losses)) if losses else fallback, self.current_epoch)

    def on_validation_epoch_end(self, val_outputs):
        """As nnU-Net's, but an absent class counts as 0: one NaN would stay in its moving average for ever."""
        tp, fp, fn = (np.sum([output[key] for output in val_outputs], 0) for key in ("tp_hard", "fp_hard", "fn_hard"))
        dice = [float(value) for value in 2 * tp / np.maximum(2 * tp + fp + fn, 1e-8)]
        loss = float(np.nan_to_num(np.mean([output["loss"] for output in val_outputs])))
        self.logger.log("mean_fg_dice", float(np.mean(dice)), self.current_epoch)
        self.logger.log("dice_per_class_or_region", dice, self.current_epoch)
        self.logger.log("val_losses", loss, self.current_epoch)

    def on_epoch_end(self):
        """One line on the console, a checkpoint, and now and then nnU-Net's plot."""
        self.logger.log("epoch_end_timestamps", time(), self.current_epoch)
        step, steps, budget = self.private.step, self.private.plan.steps, self.section.budget
        began, first = self._started
        eta = (time() - began) / max(1, step - first) * (steps - step) / 60
        dice = self.logger.get_value("mean_fg_dice", -1)
        self.print_to_log_file(
            f"step {step}/{steps}  loss {self._loss_text} (local)  pseudo Dice {dice:.3f} (local)  "
            f"epsilon {self._spent():.3f} of {budget.epsilon:g} per {budget.unit}  ETA {eta:.1f} min"
        )
        self.current_epoch += 1
        self._save_latest()
        if self.private.finished or self.current_epoch % 5 == 0:
            self.logger.plot_progress_png(self.output_folder)
            plot_spending(self.private.ledger.own_entries, budget, Path(self.output_folder) / "privacy_spent.png")

    def on_train_end(self):
        """Release the averaged weights; the running state stays in ``checkpoint_latest.pth``."""
        self._module().load_state_dict(_without_prefix(self.private.averaged_weights()))
        self.save_checkpoint(str(Path(self.output_folder) / FINAL))
        self.dataloader_train.close()
        lost = self.private.charged - self.private.step
        self.print_to_log_file(
            f"Training done: {self.private.step} of {self.private.plan.steps} steps"
            + (f" ({lost} charged steps were lost in crashes)" if lost else "")
            + f", epsilon {self._spent():.4g} of {self.section.budget.epsilon:g} at delta "
            f"{self.section.budget.delta:g} per {self.section.budget.unit}; dataset in total "
            f"{self._spent(whole_dataset=True):.4g}. Next: nnunet-dp predict -d {self.plans_manager.dataset_name} "
            f"-c {self.configuration_name} -f {self.fold} -tr {type(self).__name__} -p {self.plans_manager.plans_name} "
            f"-i IMAGES -o OUT; nnunet-dp status {self.output_folder}"
        )

    # ---- checkpoints -------------------------------------------------------------------------------------------

    def save_checkpoint(self, filename):
        """Only the finished weights; the running state is ``checkpoint_latest.pth``."""
        weights = self._module().state_dict()
        content = nnunet.final_checkpoint(
            weights, type(self).__name__, self.configuration_name, self.fold, self.inference_allowed_mirroring_axes,
            self.private.ledger.run, sum(entry.count for entry in self.private.ledger.own_entries), self.private.step,
        )  # fmt: skip
        write_checkpoint(content, Path(filename))

    def _save_latest(self):
        state = self.private.next_state(self._data_digest)
        content = {"private": state, "epoch": self.current_epoch, "logging": self.logger.get_checkpoint()}
        content["radii"] = self._radii  # public: the outcome of the charged vote
        write_checkpoint(content, Path(self.output_folder) / LATEST)
        self.private.saved(state)

    @_refuse_cleanly
    def load_checkpoint(self, filename_or_checkpoint):
        """A finished checkpoint for validation, or the newest state of a run to continue."""
        if not self.was_initialized:
            self.initialize()
        checkpoint = filename_or_checkpoint
        if not isinstance(checkpoint, dict):
            checkpoint = read_checkpoint(Path(filename_or_checkpoint))
        if "network_weights" in checkpoint:
            self._module().load_state_dict(checkpoint["network_weights"])
            self.inference_allowed_mirroring_axes = checkpoint["inference_allowed_mirroring_axes"]
            self._only_weights = True
        elif "private" in checkpoint:
            self._resume = checkpoint["private"]
            self._radii = checkpoint.get("radii")
            self.current_epoch = checkpoint["epoch"]
            self.logger.load_checkpoint(checkpoint["logging"])
        else:
            raise Refusal("the checkpoint was not written by this trainer: it cannot be continued privately")

    @_refuse_cleanly
    def perform_actual_validation(self, save_probabilities=False):
        """nnU-Net's own; a refusal under ``--val`` (a changed patients file, say) ends without a traceback."""
        self.is_ddp = self._group is not None  # here nnU-Net's way is right: each process predicts some cases
        super().perform_actual_validation(save_probabilities)

    def set_deep_supervision_enabled(self, enabled):
        """As nnU-Net's, for a network that is never wrapped in DDP."""
        self._module().decoder.deep_supervision = enabled

    def print_to_log_file(self, *args, also_print_to_console=True, add_timestamp=True):
        """As nnU-Net's, without the case names that its validation prints."""
        if self.local_rank:  # the first process says it
            return
        text = str(args[0]) if args else ""
        if text.lower().startswith("predicting ") or ", shape torch.Size" in text:
            return
        super().print_to_log_file(*args, also_print_to_console=also_print_to_console, add_timestamp=add_timestamp)

    def plot_network_architecture(self):
        """Nothing: nnU-Net's plot needs a package that is gone."""

    def _save_debug_information(self):
        """Nothing: nnU-Net would print every attribute and the host's name to disk."""

    def _module(self):
        return self.network._orig_mod if isinstance(self.network, OptimizedModule) else self.network


def _without_prefix(state):
    return {name.removeprefix("_orig_mod."): tensor for name, tensor in state.items()}


def _weights_digest(module):
    digest = hashlib.sha256()
    for tensor in module.state_dict().values():
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


class nnUNetTrainerDP_AutoS(nnUNetTrainerDP):
    """Auto-S: C / (n + gamma)."""

    clip_rule = "auto_s"


class nnUNetTrainerDP_AutoS_Morph(nnUNetTrainerDP_AutoS):
    """Auto-S with the logits opened by k = 3 inside the network, at training and at prediction (arXiv:2606.21763)."""

    in_network = "fixed"


class nnUNetTrainerDP_AutoS_MorphAdaptive(nnUNetTrainerDP_AutoS):
    """The same with each class's kernel from the private vote on its thickness; none where the vote allows none."""

    in_network = "adaptive"


class nnUNetTrainerDP_AutoS_MorphTrainingOnly(nnUNetTrainerDP_AutoS):
    """The published code's way: opened in training, not at prediction; for comparison."""

    in_network = "training_only"


class nnUNetTrainerDP_AutoV(nnUNetTrainerDP):
    """Auto-V: C / n."""

    clip_rule = "auto_v"


class nnUNetTrainerDP_NSGD(nnUNetTrainerDP):
    """NSGD: 1 / (n + r)."""

    clip_rule = "nsgd"


class nnUNetTrainerDP_PSAC(nnUNetTrainerDP):
    """PSAC: C / (n + r / (n + r))."""

    clip_rule = "psac"


class nnUNetTrainerDP_Quantile(nnUNetTrainerDP):
    """Flat clipping whose threshold follows a privately counted quantile."""

    clip_rule = "quantile"


class nnUNetTrainerDP_PerLayer(nnUNetTrainerDP):
    """Each layer clamped by itself."""

    clip_rule = "per_layer"


class nnUNetTrainerDP_Federated(nnUNetTrainer):
    """Door of a federated model: nnU-Net predicts with it. Sites train it together, so ``nnUNetv2_train`` cannot."""

    @_refuse_cleanly
    def __init__(self, plans, configuration, fold, dataset_json, device=torch.device("cuda")):  # noqa: B008
        raise UsageRefusal(
            "a federated model should be trained by its sites together, found nnUNetv2_train: type `nnunet-dp fed "
            "simulate --datasets ...` (one machine) or `nnunet-dp fed --help`; nnUNetv2_predict works as always"
        )
