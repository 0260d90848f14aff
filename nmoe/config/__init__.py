"""TOML to dataclasses: sections, rules and files; who owns which parameter; what a run costs."""
