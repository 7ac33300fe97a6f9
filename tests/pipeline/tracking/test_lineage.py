import pytest

from pipeline.tracking.lineage import name_dataset


@pytest.mark.parametrize(
    ("uri", "namespace", "name"),
    [
        ("/data/queries/", "file", "/data/queries"),
        ("file:///data/queries", "file", "/data/queries"),
        ("s3://bucket/sets/a=1/", "s3://bucket", "sets/a=1"),
        ("gs://bucket/sets", "gs://bucket", "sets"),
        ("abfss://box@account.dfs.core.windows.net/sets", "abfss://box@account.dfs.core.windows.net", "sets"),
        ("s3://bucket", "s3://bucket", "/"),
        ("/data/what?#1", "file", "/data/what?#1"),
        ("s3://bucket/a#b/c?d", "s3://bucket", "a#b/c?d"),
    ],
)
def test_datasets_have_the_names_of_the_specification(uri: str, namespace: str, name: str) -> None:
    assert name_dataset(uri) == (namespace, name)
