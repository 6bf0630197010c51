"""The gap report: how good the student is, and how like its teacher."""
