from pipeline.config.loading import hash_tree


def test_settings_digest_depends_on_values_but_not_on_key_order() -> None:
    digest = hash_tree({"task": {"instruction": "Answer: {query}", "choices": ["A", "B"]}})
    assert digest == hash_tree({"task": {"choices": ["A", "B"], "instruction": "Answer: {query}"}})
    assert digest != hash_tree({"task": {"instruction": "Answer: {query}", "choices": ["B", "A"]}})
    assert (len(digest), int(digest, 16) > 0) == (12, True)
