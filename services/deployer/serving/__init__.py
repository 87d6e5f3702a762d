"""Where versions answer: one file for each kind of server, and what is asked of a version before an agent sees it."""
