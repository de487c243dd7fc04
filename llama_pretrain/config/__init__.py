"""What a run may say: the schema, the rules across fields, composing and snapshots."""
