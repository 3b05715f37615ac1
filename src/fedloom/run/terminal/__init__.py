"""What a person types and sees: options, help, progress, errors, and how a command ends."""
