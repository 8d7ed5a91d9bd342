"""What runs in the application's own process: it loads the application, and tells what it logs and its spans say."""
