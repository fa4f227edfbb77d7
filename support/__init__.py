"""The engine room: everything that a chapter needs and does not teach. One clear thing per file."""
