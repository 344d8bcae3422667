"""Self-configuration: a pure function of budget and public facts, calibrated, and modest in size."""

from __future__ import annotations

import inspect
import itertools
import json
import math
from collections import Counter

import pytest
from dp_accounting.dp_event import DpEvent, GaussianDpEvent
from dp_accounting.pld import PLDAccountant
from dp_accounting.privacy_accountant import NeighboringRelation
from ordinary_plans import DATASET_JSON, ordinary_plans
from pydantic import ValidationError

from nnunet_dp.accounting import PrivacyBudget, epsilon, gaussian_delta, gaussian_mu
from nnunet_dp.clipping import RULE_NAMES
from nnunet_dp.errors import BudgetRefusal, UsageRefusal
from nnunet_dp.nnunet_planning import count_parameters
from nnunet_dp.planning import (
    FEWEST_STEPS,
    MORPHOLOGY_SHARE,
    PATCH_LIMIT,
    STEP_LIMIT,
    TRAINING_SHARE,
    clip_rules,
    features,
    morphology,
    parameter_limit,
    patches_per_patient,
    plan_configuration,
    public_start,
    sampling_probability,
    stages,
    steps,
)
from nnunet_dp.sections import NOT_COVERED, ByHand, MorphologyPlan, PrivacySection, covered
from nnunet_dp.shape_votes import audible

HALVED_3D = [[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2]]
HALVED_2D = [[1, 1], *[[2, 2]] * 5]


def budget(target: float = 8.0, delta: float = 1e-4) -> PrivacyBudget:
    return PrivacyBudget(epsilon=target, delta=delta)


def roughly_a_unet(shape: tuple[int, ...]) -> int:
    """About the parameters of a 3D U-Net: squares of the features."""
    return sum(135 * number**2 for number in shape)


def plan(target=8.0, patients=170, compute="full", share=MORPHOLOGY_SHARE):
    facts = (patients, (40, 56, 40), HALVED_3D, roughly_a_unet, compute)
    return plan_configuration(budget(target), *facts, morphology_share=share)


def releases(configuration, target, patients=170) -> list[DpEvent]:
    """All that a run of this plan releases."""
    schedule = configuration.privacy_plan(budget(target), "flat", patients)
    learning = [GaussianDpEvent(configuration.morphology.noise_multiplier)] if configuration.morphology else []
    return [schedule.mechanism.event] * schedule.steps + learning


def spent(configuration, target, patients=170) -> float:
    return epsilon(releases(configuration, target, patients), budget().delta)


def section() -> PrivacySection:
    return PrivacySection(
        budget=budget(),
        patients=170,
        patients_file_sha256=None,
        source_plans="nnUNetPlans",
        public_weights_sha256=None,
        not_covered=NOT_COVERED,
        configurations={"3d_fullres": plan()},
    )


def test_the_same_public_facts_give_the_same_plan():
    assert plan() == plan()


def test_neither_fold_nor_hardware_nor_data_can_reach_the_plan():
    facts = {"budget", "patients", "patch_size", "strides", "count_parameters", "compute", "image_shape"}
    facts |= {"morphology_share", "classes", "phantom_kinds", "by_hand", "fingerprint"}  # the last: what was charged
    assert set(inspect.signature(plan_configuration).parameters) == facts


@pytest.mark.parametrize(("patients", "limit"), [(1, 400_000), (170, 510_000), (300, 900_000), (10**6, 1_000_000)])
def test_parameters_are_limited_by_the_number_of_patients(patients, limit):
    assert parameter_limit(patients) == limit


@pytest.mark.parametrize(
    ("patch_size", "strides", "expected"),
    [
        ((40, 56, 40), HALVED_3D, 3),
        ((128, 128), HALVED_2D, 4),
        ((128, 128, 128), [*HALVED_3D, [2, 2, 2], [2, 2, 2]], 4),
        ((16, 16), HALVED_2D, 3),  # never fewer than three: nnU-Net gives the last output no weight
        ((20, 320, 256), [[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 2], [1, 2, 2], [1, 2, 2], [1, 2, 2]], 6),
        ((64, 64), [[1, 1], [2, 2]], 2),  # never more than the plans have
    ],
)
def test_stages_end_where_the_feature_map_falls_below_ten_voxels(patch_size, strides, expected):
    assert stages(patch_size, strides) == expected


def test_features_double_from_sixteen_and_stay_within_the_limit():
    for limit in (50_000, 100_000, 500_000, 1_000_000, 10**9):
        shape = features(limit, roughly_a_unet, 5)
        assert roughly_a_unet(shape) <= limit
        assert all(wide in (narrow, 2 * narrow) for narrow, wide in itertools.pairwise(shape))
        assert shape[0] == min(16, shape[-1])


def test_more_parameters_allowed_never_give_fewer_features():
    found = [features(limit, roughly_a_unet, 6) for limit in range(60_000, 3_000_000, 50_000)]
    assert found == sorted(found) and len(set(found)) > 3


def test_a_network_that_cannot_meet_the_limit_is_as_narrow_as_possible():
    assert features(1, roughly_a_unet, 3) == (8, 8, 8)


def test_steps_grow_with_epsilon_and_with_patients_and_shrink_with_parameters():
    by_epsilon = [steps(budget(target), 170, 340_000, "full") for target in (0.5, 1, 3, 8, 20)]
    by_patients = [steps(budget(), patients, 340_000, "full") for patients in (10, 50, 170, 400, 5000)]
    by_parameters = [steps(budget(), 170, parameters, "full") for parameters in (100_000, 340_000, 1_000_000)]
    assert by_epsilon == sorted(by_epsilon) and by_epsilon[1] < by_epsilon[3]
    assert by_patients == sorted(by_patients) and by_patients[1] < by_patients[3]
    assert by_parameters == sorted(by_parameters, reverse=True)


@pytest.mark.parametrize(("target", "known"), [(8, 100), (3, 40)])
def test_steps_reproduce_the_best_known_schedules(target, known):
    assert steps(budget(target), 170, 340_000, "full") == pytest.approx(known, rel=0.25)


@pytest.mark.parametrize("compute", ["full", "small"])
def test_steps_and_patches_keep_their_public_limits(compute):
    for patients in (3, 50, 170, 2000, 100_000):
        count = steps(budget(), patients, 400_000, compute)
        q = sampling_probability(patients, count, 1, compute)
        assert FEWEST_STEPS <= count <= STEP_LIMIT[compute] and 0 < q <= 1
        training = TRAINING_SHARE * patients
        enough = math.isclose(q * training, 64, rel_tol=1e-3) or q == 1
        assert enough or q * training * count <= 1.001 * PATCH_LIMIT[compute]


@pytest.mark.parametrize("patients", [20, 100, 170, 260, 400])
def test_a_few_hundred_patients_train_with_the_full_batch(patients):
    count = steps(budget(), patients, parameter_limit(patients), "full")
    assert sampling_probability(patients, count, 1, "full") == 1.0


@pytest.mark.parametrize(
    ("patch_size", "image_shape", "patches"),
    [
        ((128, 128), (36, 50, 35), 8),
        ((128, 128), (5, 50, 35), 5),
        ((128, 128), (1, 80, 80), 1),
        ((128, 128), (), 1),
        ((40, 56, 40), (36, 50, 35), 1),
    ],
)
def test_slices_of_a_volume_are_averaged_and_whole_patches_are_not(patch_size, image_shape, patches):
    assert patches_per_patient(patch_size, image_shape) == patches


@pytest.mark.parametrize(("target", "patients"), [(0.5, 170), (1, 40), (3, 170), (8, 170), (8, 1600), (20, 400)])
def test_the_calibrated_schedule_spends_at_least_99_percent_of_its_target_and_never_more(target, patients):
    assert 0.99 * target <= spent(plan(target, patients), target) <= target


# ---- the share of morphology -------------------------------------------------------------------------------------


def by_dp_accounting(events, delta: float) -> float:
    accountant = PLDAccountant(NeighboringRelation.REPLACE_SPECIAL, value_discretization_interval=1e-3)
    for event, count in Counter(events).items():
        accountant.compose(event, count)
    return accountant.get_epsilon(delta)


@pytest.mark.parametrize("share", [0.0, 0.04, 0.3])
@pytest.mark.parametrize("patients", [170, 9000])  # full batch, Poisson draws
@pytest.mark.parametrize("target", [1, 3, 8])
def test_training_and_morphology_together_meet_the_target_and_never_pass_it(target, patients, share):
    configuration = plan(target, patients, share=share)
    assert (configuration.sampling_probability == 1) == (patients == 170)
    assert (configuration.morphology is None) == (share == 0)
    total = configuration.privacy_plan(budget(target), "flat", patients)
    assert total.epsilon == pytest.approx(spent(configuration, target, patients), rel=1e-9)
    assert 0.99 * target <= total.epsilon <= target
    total.verify()
    assert by_dp_accounting(releases(configuration, target, patients), 1e-4) == pytest.approx(total.epsilon, rel=2e-3)


@pytest.mark.parametrize("share", [0.0, 0.04, 0.3])
@pytest.mark.parametrize("target", [0.5, 3, 8, 20])
def test_on_the_full_batch_squares_of_mu_add_up_to_the_budget_in_the_planned_shares(target, share):
    configuration = plan(target, share=share)
    training = configuration.steps / configuration.noise_multiplier**2
    learning = configuration.morphology.noise_multiplier**-2 if share else 0.0
    assert learning == pytest.approx(share * gaussian_mu(budget(target)) ** 2, rel=1e-9)
    assert gaussian_delta(math.sqrt(training + learning), target) <= budget().delta
    assert gaussian_delta(math.sqrt(training + learning), 0.99 * target) >= budget().delta
    assert learning / (training + learning) == pytest.approx(share, rel=0.02)


def test_a_larger_share_leaves_the_training_more_noise_and_the_votes_less():
    plans = [plan(share=share) for share in (0.01, 0.04, 0.3)]
    training = [found.noise_multiplier for found in plans]
    votes = [found.morphology.noise_multiplier for found in plans]
    assert training == sorted(training) and votes == sorted(votes, reverse=True)
    assert training[1] / plan(share=0.0).noise_multiplier == pytest.approx(1.02, abs=0.01)


@pytest.mark.parametrize("share", [-0.01, 0.51, 1.0, math.nan])
def test_a_share_that_leaves_too_little_for_the_training_is_refused(share):
    with pytest.raises(UsageRefusal, match=r"should lie in \[0, 0\.5\]"):
        plan(share=share)


def test_a_share_that_no_vote_would_be_heard_in_is_given_to_the_training():
    few, many = plan(1.0, 40), plan(1.0, 9000)
    assert few.morphology is None and many.morphology is not None
    assert few == plan(1.0, 40, share=0.0)
    counts = [morphology(budget(1.0), 0.04, 170, classes) is not None for classes in range(1, 40)]
    assert counts == sorted(counts, reverse=True) and len(set(counts)) == 2


def test_what_the_plan_reserves_is_heard_by_the_smallest_fold_it_was_made_for():
    for patients in range(20, 400, 7):
        found = morphology(budget(3.0), 0.04, patients, 2)
        units = int(TRAINING_SHARE * patients)
        heard = audible(units, 1 / (math.sqrt(0.04) * gaussian_mu(budget(3.0))), 2)
        assert (found is not None) == (heard > 0)


def test_a_plan_says_that_its_epsilon_covers_the_rules_only_where_it_learns_them():
    assert any("morphology.json" in covers for covers in covered(section(), "3d_fullres"))
    assert covered(section(), "2d") == section().covers


def test_a_plan_whose_morphology_was_given_less_noise_by_hand_is_refused():
    honest = plan()
    greedy = honest.model_copy(update={"morphology": MorphologyPlan(share=0.04, noise_multiplier=1.0)})
    with pytest.raises(BudgetRefusal, match="would spend epsilon"):
        greedy.privacy_plan(budget(), "flat", 136).verify()


def test_plans_made_before_there_was_a_share_are_read_and_learn_nothing():
    content = section().model_dump(mode="json")
    del content["configurations"]["3d_fullres"]["morphology"]
    found = PrivacySection.model_validate(content).configurations["3d_fullres"]
    assert found.morphology is None and found.privacy_plan(budget(), "flat", 136).morphology is None


@pytest.mark.parametrize(("field", "wrong"), [("share", 0.0), ("share", 1.0), ("noise_multiplier", 0.0), ("sigma", 1)])
def test_a_share_with_an_impossible_number_is_refused(field, wrong):
    content = section().model_dump(mode="json")
    content["configurations"]["3d_fullres"]["morphology"][field] = wrong
    with pytest.raises(ValidationError, match=field):
        PrivacySection.model_validate(content)


# ---- the section -------------------------------------------------------------------------------------------------


def test_the_small_schedule_is_recorded_and_keeps_the_same_budget():
    small = plan(compute="small")
    assert (small.compute, plan().compute) == ("small", "full")
    assert small.steps < plan().steps
    assert 0.99 * 8 <= spent(small, 8) <= 8


@pytest.mark.parametrize("rule", RULE_NAMES)
def test_every_clip_rule_is_planned_and_can_be_trained_with(rule):
    configuration = plan()
    chosen = configuration.privacy_plan(budget(), rule, 136)
    chosen.verify()
    assert chosen.rule == configuration.clip_rules[rule].rule(rule)
    assert chosen.expected_batch == configuration.sampling_probability * 136
    assert configuration.schedule(rule).learning_rate == configuration.clip_rules[rule].learning_rate


def test_the_plan_holds_exactly_the_known_rules_and_no_momentum():
    assert tuple(clip_rules(1.0)) == RULE_NAMES
    assert plan().momentum == 0.0


@pytest.mark.parametrize("configuration", ["3d_fullres", "2d"])
@pytest.mark.parametrize("kind", ["PlainConvUNet", "ResidualEncoderUNet"])
def test_nnunets_own_network_is_shrunk_to_between_0_3_and_1_million_parameters(configuration, kind):
    plans = ordinary_plans(kind)
    source = plans["configurations"][configuration]
    found = plan_configuration(
        budget(),
        200,
        tuple(source["patch_size"]),
        source["architecture"]["arch_kwargs"]["strides"],
        lambda shape: count_parameters(plans, configuration, DATASET_JSON, shape),
        "full",
    )
    assert 300_000 <= found.network.parameters <= 1_000_000
    assert found.network.parameters <= parameter_limit(200)


def test_the_section_survives_json_unchanged():
    written = json.dumps(section().model_dump(mode="json"))
    assert PrivacySection.model_validate(json.loads(written)) == section()


@pytest.mark.parametrize("place", [(), ("budget",), ("configurations", "3d_fullres"),
                                   ("configurations", "3d_fullres", "network"),
                                   ("configurations", "3d_fullres", "morphology"),
                                   ("configurations", "3d_fullres", "clip_rules", "flat")])  # fmt: skip
def test_a_section_with_an_unknown_field_is_refused(place):
    content = section().model_dump(mode="json")
    inner = content
    for key in place:
        inner = inner[key]
    inner["sigma"] = 1.0
    with pytest.raises(ValidationError, match="sigma"):
        PrivacySection.model_validate(content)


@pytest.mark.parametrize(
    ("field", "wrong"),
    [("steps", 0), ("sampling_probability", 0.0), ("sampling_probability", 1.1), ("noise_multiplier", 0.0),
     ("patches_per_patient", 0), ("augmentation", "secret"), ("average_share", 0.0), ("momentum", 1.0)],
)  # fmt: skip
def test_a_configuration_with_an_impossible_number_is_refused(field, wrong):
    content = section().model_dump(mode="json")
    content["configurations"]["3d_fullres"][field] = wrong
    with pytest.raises(ValidationError, match=field):
        PrivacySection.model_validate(content)


def test_a_section_of_another_version_is_refused():
    with pytest.raises(ValidationError, match="version"):
        PrivacySection.model_validate(section().model_dump(mode="json") | {"version": 2})


def test_a_section_whose_delta_would_pass_for_giving_one_patient_away_is_refused():
    content = section().model_dump(mode="json") | {"patients": 10_000}
    with pytest.raises(ValidationError, match="below 1 / number of units"):
        PrivacySection.model_validate(content)


def test_a_planned_section_is_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        section().patients = 3


def by_hand(*settings: str):
    return plan_configuration(
        budget(), 170, (40, 56, 40), HALVED_3D, roughly_a_unet, "full", by_hand=ByHand.parse(settings)
    )


@pytest.mark.parametrize("setting", ["steps=50", "sampling_probability=0.3", "features_per_stage=8,16,32"])
def test_a_field_set_by_hand_is_marked_and_the_noise_calibrated_again(setting):
    mine = by_hand(setting)
    assert mine.by_hand == (setting.partition("=")[0],)
    assert 0.99 * 8 < spent(mine, 8.0) <= 8
    if "features" not in setting:
        assert mine.noise_multiplier != by_hand().noise_multiplier


def test_what_moves_only_accuracy_leaves_the_noise_as_it_is():
    mine, ruled = by_hand("momentum=0.5", "learning_rate=0.2", "decay_power=0"), by_hand()
    assert mine.noise_multiplier == ruled.noise_multiplier and mine.steps == ruled.steps
    assert (mine.momentum, mine.decay_power, mine.clip_rules["psac"].learning_rate) == (0.5, 0.0, 0.2)


@pytest.mark.parametrize(
    "setting", ["noise_multiplier=1", "steps=0", "steps=many", "momentum=1", "steps", "features_per_stage=8,16"]
)
def test_an_impossible_setting_is_refused_with_the_possible_ones(setting):
    with pytest.raises(UsageRefusal, match="sampling_probability"):
        by_hand(setting)


def test_more_stages_than_the_plans_have_are_refused():
    with pytest.raises(UsageRefusal, match="at most 4"):
        by_hand("features_per_stage=8,8,8,8,8")


def test_a_public_start_is_planned_where_phantoms_are_named_and_stays_below_half_an_hour():
    assert by_hand().start is None
    for patch in ((40, 56, 40), (128, 128, 128), (128, 128), (512, 512)):
        for compute in ("full", "small"):
            start = public_start(("shapes",), patch, compute)
            voxels = start.iterations * start.batch * math.prod(patch)
            assert 300 <= start.iterations <= 3000 and (voxels <= 1.25e9 or start.iterations == 300)


def test_a_start_from_shapes_keeps_the_long_schedule_and_one_from_the_organ_shortens_it():
    facts = (170, (40, 56, 40), HALVED_3D, roughly_a_unet, "full")
    none, shapes, organ = (plan_configuration(budget(), *facts, phantom_kinds=k) for k in ((), ("shapes",), ("heart",)))
    assert shapes.start is not None and organ.start is not None
    assert (shapes.steps, shapes.clip_rules) == (none.steps, none.clip_rules)
    assert organ.steps < shapes.steps
