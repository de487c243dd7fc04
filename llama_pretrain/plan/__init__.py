"""What a run will do, by arithmetic: nothing here imports torch or starts anything."""
