from longvlm.schemas import tables
from longvlm.schemas.rows import OutcomeRow, PlanRow, ShardRow
from longvlm.schemas.tables import AskedQuestion, GroupRow, QuestionRow


def test_each_operator_gets_what_it_needs():
    """What flows in holds what the next stage reads: listing, plan, frames, encoded, outcomes, ledger."""
    assert set(tables.LISTING.names) < set(tables.PLAN.names) - {"first_unit", "end_unit"} < set(tables.VIDEOS.names)
    unit = set(tables.OUTCOMES.names) - {"tokens_shard", "segments_shard", "encode_ms"}
    assert unit < set(tables.FRAMES.names)
    assert unit < set(tables.ENCODED.names)
    per_segment = {field.name for field in tables.ENCODED_SEGMENT}
    from_unit = {"video_id", "recipe", "write_id"}
    assert set(tables.SEGMENTS.names) | set(tables.TOKENS.names) == per_segment | from_unit


def test_every_stored_row_says_which_recipe_made_it():
    for name in ("videos", "segments", "tokens", "recipes"):
        assert "recipe" in tables.TABLES[name].names
    assert "answer_recipe" in tables.ANSWERS.names


def test_rows_as_functions_take_them_have_the_columns_of_their_tables():
    assert QuestionRow.__required_keys__ == {*tables.QUESTIONS.names}
    assert PlanRow.__required_keys__ == {*tables.PLAN.names}
    assert OutcomeRow.__required_keys__ == {*tables.OUTCOMES.names}
    assert ShardRow.__required_keys__ == {field.name for field in tables.SHARD}
    assert GroupRow.__required_keys__ == {*tables.GROUPS.names}
    asked = tables.GROUPS.field("questions").type.value_type
    assert AskedQuestion.__required_keys__ == {field.name for field in asked}
