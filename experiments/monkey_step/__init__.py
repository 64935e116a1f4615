"""What a training step of Monkey costs beside a plain port of the published loop."""
