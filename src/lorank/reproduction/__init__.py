"""The paper's tables: one file a row, with what was done, what was published, and how to do it again."""
