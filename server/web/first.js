// The modules (in <template id="modules">) come once it is on the screen: they would only take the processor from it.
document.addEventListener("DOMContentLoaded", () => {
  const load = () => document.head.append(document.getElementById("modules").content);
  new PerformanceObserver(load).observe({ type: "paint", buffered: true });
  // A tab that nobody sees is not painted, and not every browser tells.
  if (document.hidden) load();
  else setTimeout(load, 400);
});

// Runs before the first paint, so that who chose a scheme by hand never sees the other one flash by.
{
  const chosen = localStorage.getItem("oneloop.theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
}
