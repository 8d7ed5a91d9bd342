"""What a run comes to, for people and for programs: as JSON, as JUnit XML, as a page, and as what a terminal shows."""
