// On a small screen, parts that few read begin closed; on paper all are open.
function useDetails() {
  const parts = [...document.querySelectorAll("details")];
  if (innerWidth < 640) for (const each of parts) each.open = false;
  let closed = [];
  addEventListener("beforeprint", () => {
    closed = parts.filter((each) => !each.open);
    for (const each of closed) each.open = true;
  });
  addEventListener("afterprint", () => { for (const each of closed) each.open = false; });
}

// Tabs of ways to train, and buttons that copy what stands beside them.
function useTabs() {
  const tabs = [...document.querySelectorAll("[role=tab]")];
  const show = (chosen) => {
    for (const tab of tabs) {
      const isChosen = tab === chosen;
      tab.setAttribute("aria-selected", String(isChosen));
      tab.tabIndex = isChosen ? 0 : -1;
      byId(tab.getAttribute("aria-controls")).hidden = !isChosen;
    }
  };
  tabs.forEach((tab, index) => {
    tab.addEventListener("click", () => show(tab));
    tab.addEventListener("keydown", (event) => {
      const to = { ArrowRight: index + 1, ArrowLeft: index - 1, Home: 0, End: tabs.length - 1 }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      const next = tabs[(to + tabs.length) % tabs.length];
      show(next);
      next.focus();
    });
  });
  if (tabs.length) show(tabs[0]);
  for (const button of document.querySelectorAll(".copy")) {
    const code = button.parentElement.querySelector("code");
    button.setAttribute("aria-label", "Copy " + button.parentElement.querySelector("pre").getAttribute("aria-label"));
    button.addEventListener("click", async () => {
      const selected = getSelection(), range = document.createRange();
      range.selectNodeContents(code);
      selected.removeAllRanges();
      selected.addRange(range);
      let copied = false;
      try {
        await navigator.clipboard.writeText(code.textContent);
        copied = true;
      } catch {
        copied = document.execCommand("copy");  // pages that were opened from disk, in some browsers
      }
      button.textContent = copied ? "Copied" : "Selected";
      setTimeout(() => { button.textContent = "Copy"; }, 1500);
    });
  }
}
