"""Without an optional package, reading names the extra that installs it; npz needs none."""

from __future__ import annotations

import subprocess
import sys

import pytest
import sample_files as sample

from fmft_fast.data import read_episodes
from fmft_fast.errors import MissingDependencyError


@pytest.mark.parametrize(
    ("package", "mark"),
    [("h5py", "a.hdf5"), ("zarr", ".zgroup"), ("pyarrow", "data/chunk-000/file-000.parquet")],
)
def test_the_extra_is_named(package, mark, tmp_path, monkeypatch):
    (tmp_path / mark).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / mark).touch()
    if package == "pyarrow":
        (tmp_path / "meta").mkdir()
        feature = '{"codebase_version": "v3.0", "features": {"x": {"dtype": "f", "shape": [1]}}}'
        (tmp_path / "meta" / "info.json").write_text(feature)
    monkeypatch.setitem(sys.modules, package, None)
    path = tmp_path / mark if package == "h5py" else tmp_path
    with pytest.raises(MissingDependencyError, match=rf"need {package}: .*'fmft-fast\[data\]'"):
        read_episodes(path)


def test_npz_and_import_need_no_optional_package(tmp_path):
    file = sample.write_npz(tmp_path)
    code = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(('h5py', 'zarr', 'pyarrow')))\n"
        "from fmft_fast.data import read_episodes\n"
        f"print(read_episodes({str(file)!r}).steps)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == str(sum(sample.LENGTHS))
