// Runs before the first paint, so that who chose a scheme by hand never sees the other one flash by.
{
  const chosen = localStorage.getItem("oneloop.theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
}
