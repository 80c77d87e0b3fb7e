"""What each party may make the product do: every test acts as the weaker party."""
