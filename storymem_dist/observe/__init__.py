"""All that observes a render: event files, console, Weights & Biases, report. Knows events, not how they arise."""
