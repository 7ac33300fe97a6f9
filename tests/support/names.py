"""Names that a file must not be able to give to other files; ``{}`` stands for a good one."""

# Of no file or folder directly or anywhere below.
ESCAPING_NAMES = {
    "folder above": "../{}",
    "folders above": "../../{}",
    "through a folder": "x/../../../victim/{}",
    "absolute path": "/etc/{}",
    "backslashes": "..\\..\\{}",
    "NUL": "{}\0",
    "line break": "{}\n",
    "URI": "s3://bucket/{}",
    "hidden": ".{}",
    "percent signs": "%2e%2e%2f{}",
    "dots": "..",
}
EVIL_NAMES = {
    **ESCAPING_NAMES,
    "folder below": "x/{}",
    "other digits": "shard-٠٠٠٠٠.faiss",
    "suffix": "{}.bak",
    "empty": "",
}
