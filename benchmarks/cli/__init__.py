"""The command line as a person meets it: how soon anything is on the screen."""
