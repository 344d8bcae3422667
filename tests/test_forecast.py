"""The forecast: larger patches take longer and more memory, and words say so."""

import torch

from nnunet_dp import forecast
from nnunet_dp.forecast import Forecast, machine_memory_bytes, measure


def network() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 2, 3))


def test_memory_counts_every_kept_tensor_once():
    kept = [measure(network(), (1, edge, edge), torch.device("cpu")).memory_bytes for edge in (64, 128)]
    assert 3 < kept[1] / kept[0] < 5
    assert kept[0] > 8 * 62 * 62 * 4  # at least the activation between the layers


def test_a_larger_patch_takes_longer():
    small, large = (measure(network(), (1, edge, edge), torch.device("cpu")) for edge in (32, 512))
    assert large.seconds_per_patch > small.seconds_per_patch > 0


def test_networks_with_several_outputs_are_measured():
    class Deep(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.unused = torch.nn.Conv2d(1, 2, 1), torch.nn.Conv2d(1, 2, 1)

        def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
            return [self.head(image), self.head(image[..., ::2, ::2])]

    assert measure(Deep(), (1, 16, 16), torch.device("cpu")).memory_bytes > 0


def test_minutes_are_patches_times_seconds():
    said = Forecast("cpu", 0.5, 3 * 2**20).describe(private_patches=1200, public_patches=240)
    assert "about 10 min" in said and "before it 2" in said and "3 MiB" in said
    assert "public" not in Forecast("cpu", 0.5, 1).describe(1200, 0)


def test_a_containers_limit_counts_where_it_is_less_than_the_machine_has(tmp_path, monkeypatch):
    files = [tmp_path / name for name in ("v2", "v1", "absent")]
    monkeypatch.setattr(forecast, "CONTAINER_LIMITS", files)
    whole = machine_memory_bytes()
    assert 2**28 < whole < 2**50
    for limit, expected in (("max", whole), (str(2**62), whole), (str(2**27), 2**27)):
        files[0].write_text(limit + "\n")
        assert machine_memory_bytes() == expected
