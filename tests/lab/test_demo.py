import pytest

from mixturelens.files import read_json
from mixturelens.lab.demo import INSTRUMENTS, demo
from mixturelens.types import InputError


def test_a_folder_of_another_run_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="is not empty and holds no run"):
        demo(tmp_path)


@pytest.mark.slow
def test_two_at_once_find_what_the_demo_shows_and_measure_nothing_twice(tmp_path):
    said = []
    pairs = demo(tmp_path / "demo", jobs=2, say=said.append)
    assert [each.partition(":")[0] for each in said] == list(INSTRUMENTS)
    for pair in pairs:
        record = read_json(pair.records / "repair.json", "is gone")
        assert max(each["gap_closed"]["value"] for each in record["repairs"]) > 0.9
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "demo/records").rglob("*.json")}
    demo(tmp_path / "demo", jobs=2)
    assert files == {file: file.stat().st_mtime_ns for file in (tmp_path / "demo/records").rglob("*.json")}
