"""From pairs to static batch plans (paper, section 3); nothing here needs a device."""
