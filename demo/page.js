(() => {
  // A file that is too large is refused before it is sent.
  const refuse = (text) => {
    document.querySelector("#refusal")?.remove();
    if (!text) return;
    const line = document.createElement("p");
    Object.assign(line, { id: "refusal", className: "message error", textContent: text });
    line.setAttribute("role", "alert");
    document.querySelector("#source")?.before(line);
  };
  const choosing = (event) => {
    const file = event.target.type === "file" ? event.target.files[0] : null;
    if (!file) return;
    const limit = Number(document.querySelector("[data-max-bytes]").dataset.maxBytes);
    refuse("");
    if (file.size <= limit) return;
    event.stopImmediatePropagation();
    event.target.value = "";
    refuse(`This file has ${(file.size / 1e6).toFixed(1)} MB; ${limit / 1e6} MB at most.`);
  };
  document.addEventListener("change", choosing, true);

  // A picture that is dropped or pasted anywhere goes the way of one that was chosen with the button.
  const give = (files) => {
    const input = document.querySelector('input[type="file"]');
    if (!input || !files.length) return;
    const carrier = new DataTransfer();
    carrier.items.add(files[0]);
    input.files = carrier.files;
    input.dispatchEvent(new Event("change", { bubbles: true }));
  };
  const holdsFiles = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
  document.addEventListener("dragover", (event) => {
    if (holdsFiles(event)) event.preventDefault();
  });
  document.addEventListener("drop", (event) => {
    if (!holdsFiles(event)) return;
    event.preventDefault();
    give([...event.dataTransfer.files]);
  });
  document.addEventListener("paste", (event) => {
    const files = [...(event.clipboardData?.files ?? [])];
    if (!files.length) return;
    event.preventDefault();
    give(files);
  });

  // When a part of the page is drawn anew, the focus stays with the button that had it, wherever that has moved.
  let key = null;
  document.addEventListener("focusin", (event) => (key = event.target.dataset?.key ?? null));
  new MutationObserver(() => {
    const active = document.activeElement;
    if (!key || active?.dataset.key === key || (active !== document.body && !active?.dataset.key)) return;
    document.querySelector(`[data-key="${CSS.escape(key)}"]`)?.focus({ preventScroll: true });
  }).observe(document.documentElement, { childList: true, subtree: true, attributeFilter: ["data-key"] });

  // Tables and code of the texts scroll in their own box: with keys, too, and under the name of their heading.
  const boxes = ":is(.measured, .told) :is(table, pre):not([tabindex])";
  const isBefore = (box) => (heading) => heading.compareDocumentPosition(box) & Node.DOCUMENT_POSITION_FOLLOWING;
  new MutationObserver(() => {
    for (const box of document.querySelectorAll(boxes)) {
      const headings = [...document.querySelectorAll(":is(.measured, .told) :is(h1, h2, h3, h4)")];
      box.tabIndex = 0;
      box.setAttribute("role", box.matches("table") ? "table" : "group");
      box.setAttribute("aria-label", headings.filter(isBefore(box)).at(-1)?.textContent.trim() || "Example");
    }
  }).observe(document.documentElement, { childList: true, subtree: true });
})();
