"""How far the student is from what the teacher says, and how that becomes a gradient."""
