"""NIC rates from a made-up /sys: InfiniBand, RoCE, bonds, EFA, virtual functions, storage NICs, and none at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from epv2_plugin.elastic.network import Port, rdma_ports, rdma_rate


class Sysfs:
    """A /sys of a machine's network devices."""

    def __init__(self, root: Path):
        self.root = root

    def device(
        self, name: str, rate: str | None = "400 Gb/sec (4X NDR)", state: str = "4: ACTIVE", driver: str = "mlx5_core"
    ) -> Path:
        """An RDMA device with one port; returns the folder of its PCI function."""
        pci = self.root / "devices" / f"pci-{name}"
        (self.root / "drivers" / driver).mkdir(parents=True, exist_ok=True)
        pci.mkdir(parents=True)
        (pci / "driver").symlink_to(self.root / "drivers" / driver)
        port = self.root / "class/infiniband" / name / "ports/1"
        port.mkdir(parents=True)
        (port / "state").write_text(state + "\n")
        if rate is not None:
            (port / "rate").write_text(rate + "\n")
        (port.parent.parent / "device").symlink_to(pci)
        return pci

    def bond(self, name: str, speed: str, members: tuple[str, ...]) -> None:
        bond = self.root / "class/net" / name
        (bond / "bonding").mkdir(parents=True)
        (bond / "speed").write_text(speed + "\n")
        for member in members:
            (self.root / "class/net" / member).mkdir()
            (self.root / "class/net" / member / "master").symlink_to(bond)


@pytest.fixture
def sysfs(tmp_path: Path) -> Sysfs:
    return Sysfs(tmp_path)


def test_eight_nics_and_a_slower_one_for_storage(sysfs: Sysfs) -> None:
    for index in range(8):
        sysfs.device(f"mlx5_{index}")
    sysfs.device("mlx5_8", "100 Gb/sec (4X EDR)")
    sysfs.device("mlx5_9", state="1: DOWN")
    assert len(rdma_ports(sysfs.root)) == 9
    rate, source = rdma_rate(gpus_per_node=8, sysfs=sysfs.root)
    assert rate == pytest.approx(45)
    assert source == "8 x 400 Gbit/s ports here over 8 GPUs, 90% of nominal"
    assert rdma_rate(gpus_per_node=4, sysfs=sysfs.root)[0] == pytest.approx(90)


def test_one_nic_for_all(sysfs: Sysfs) -> None:
    sysfs.device("mlx5_0", "200 Gb/sec (2X NDR)")
    assert rdma_rate(gpus_per_node=8, sysfs=sysfs.root)[0] == pytest.approx(0.9 * 25 / 8)


@pytest.mark.parametrize("through", ["gid", "member"])
@pytest.mark.parametrize(("speed", "gbits"), [("400000", 400), ("-1", 200), ("", 200)])
def test_a_bond_carries_what_its_members_do(sysfs: Sysfs, through: str, speed: str, gbits: float) -> None:
    pci = sysfs.device("mlx5_bond_0", "200 Gb/sec (4X HDR)")
    sysfs.bond("bond0", speed, ("eth0", "eth1"))
    if through == "gid":
        names = sysfs.root / "class/infiniband/mlx5_bond_0/ports/1/gid_attrs/ndevs"
        names.mkdir(parents=True)
        (names / "0").write_text("bond0\n")
    else:
        (pci / "net/eth0").mkdir(parents=True)
    assert rdma_ports(sysfs.root) == [Port("mlx5_bond_0", gbits, "bond")]
    assert "(bond)" in rdma_rate(gpus_per_node=1, sysfs=sysfs.root)[1]


def test_efa(sysfs: Sysfs) -> None:
    for index in range(32):
        sysfs.device(f"rdmap{index}s0", "100 Gb/sec (4X EDR)", driver="efa")
    rate, source = rdma_rate(gpus_per_node=8, sysfs=sysfs.root)
    assert rate == pytest.approx(45)
    assert source.startswith("32 x 100 Gbit/s ports here (EFA) over 8 GPUs")


def test_virtual_functions_are_counted_where_they_are_all_there_is(sysfs: Sysfs, tmp_path: Path) -> None:
    physical = sysfs.device("mlx5_0")
    for index in (1, 2):
        (sysfs.device(f"mlx5_{index}") / "physfn").symlink_to(physical)
    assert [port.device for port in rdma_ports(sysfs.root)] == ["mlx5_0"]
    container = Sysfs(tmp_path / "container")
    (container.device("mlx5_1") / "physfn").symlink_to(physical)
    assert [port.device for port in rdma_ports(container.root)] == ["mlx5_1"]


def test_software_devices_do_not_count(sysfs: Sysfs) -> None:
    sysfs.device("rxe0")
    (sysfs.root / "class/infiniband/rxe0/parent").write_text("eth0\n")
    sysfs.device("siw0")
    (sysfs.root / "class/infiniband/siw0/device").unlink()
    assert rdma_ports(sysfs.root) == []


@pytest.mark.parametrize("rate", [None, "", "0 Gb/sec (4X)", "unknown", "Gb/sec"])
def test_a_port_without_a_rate_is_never_a_zero(sysfs: Sysfs, rate: str | None) -> None:
    sysfs.device("efa_0", rate, driver="efa")
    message = (
        r"^network.rdma_gbytes_per_s = 'auto': no active RDMA port with a rate in .*class/infiniband; "
        r"set network.rdma_gbytes_per_s to the GB/s that one GPU reaches in one direction$"
    )
    with pytest.raises(ValueError, match=message):
        rdma_rate(gpus_per_node=8, sysfs=sysfs.root)
    assert rdma_rate(12.5, gpus_per_node=8, sysfs=sysfs.root) == (12.5, "network.rdma_gbytes_per_s, as it is")


def test_no_sysfs_at_all(tmp_path: Path) -> None:
    assert rdma_ports(tmp_path / "nowhere") == []


@pytest.mark.parametrize("rate", [0, -1, float("nan")])
def test_a_configured_rate_is_above_zero(rate: float) -> None:
    with pytest.raises(ValueError, match=r"^network.rdma_gbytes_per_s = .*: must be above 0$"):
        rdma_rate(rate, gpus_per_node=8)
