// Runs before the first paint, so that who chose a scheme by hand never sees the other one flash by.
{
  const chosen = localStorage.getItem("oneloop.theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
}

// The modules (in <template id="modules">) come after it: they would only take the processor from it.
document.addEventListener("DOMContentLoaded", () => {
  const load = () => document.head.append(document.getElementById("modules").content);
  // Nothing is painted in a tab that nobody sees.
  if (document.hidden) load();
  else requestAnimationFrame(() => setTimeout(load));
});
