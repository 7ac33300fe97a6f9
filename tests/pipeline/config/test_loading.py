from pipeline.config.loading import hash_tree


def test_digest_of_settings_changes_with_values_and_not_with_the_order_of_keys() -> None:
    digest = hash_tree({"task": {"instruction": "Answer: {query}", "choices": ["A", "B"]}})
    assert digest == hash_tree({"task": {"choices": ["A", "B"], "instruction": "Answer: {query}"}})
    assert digest != hash_tree({"task": {"instruction": "Answer: {query}", "choices": ["B", "A"]}})
    assert (len(digest), int(digest, 16) > 0) == (12, True)
