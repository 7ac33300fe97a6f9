"""Whole runs from and to Google's and Azure's stores, on emulators."""

from dataclasses import replace
from pathlib import Path

import pytest
from pyarrow import fs

from tests.faults.campaign import model_folder
from tests.faults.harness import Job, wait_for, write_queries
from tests.support.clouds import AZURITE, serving


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["google", pytest.param("azure", marks=AZURITE)])
def test_run_whose_driver_is_killed_is_resumed(kind: str, tmp_path: Path) -> None:
    write_queries(tmp_path / "queries", 60, {45: "WAITS"})
    (tmp_path / "waits").touch()
    with serving(kind, tmp_path) as store:
        client = store.filesystem()
        for file in (tmp_path / "queries").iterdir():
            with client.open_output_stream(f"bucket/queries/{file.name}") as stream:
                stream.write(file.read_bytes())
        places = f"{store.place}/queries", f"{store.place}/out"
        job = Job(*places, model_folder(tmp_path), environment=store.environment, filesystem=client)
        running = job.start()

        def list_units() -> dict[str, int]:
            found = client.get_file_info(fs.FileSelector("bucket/out/data", allow_not_found=True))
            return {info.path: info.mtime_ns for info in found if info.base_name.startswith("part-")}

        wait_for(lambda: len(list_units()) >= 5)
        before = list_units()
        running.kill()
        (tmp_path / "waits").unlink()
        status, said = job.finish()
        assert replace(job, output="bucket/out").problems(tmp_path / "queries", status, said) == []
        assert {path: time for path, time in list_units().items() if path in before} == before
        again, said = job.finish()
        assert (again, "is already complete; nothing to do" in said) == (0, True)
