"""Questions as they are asked, answers as they are read, and the seconds they rest on."""
