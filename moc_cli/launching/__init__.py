"""Starting the processes that run one command together, and the launchers of others."""
