"""What every room may use: whole files, processes, progress bars, figures, the version."""
