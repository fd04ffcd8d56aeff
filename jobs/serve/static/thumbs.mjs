// Thumbs: a verdict is sent without leaving the page, so that a video plays on. Without this the form does it.

for (const form of document.querySelectorAll("[data-thumbs]"))
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const chosen = event.submitter;
    const fields = new URLSearchParams(new FormData(form, chosen));
    const buttons = form.querySelectorAll("button");
    buttons.forEach((button) => (button.disabled = true));
    // the answer leads back to this page, which is not to be loaded again
    const answer = await fetch(form.action, { method: "POST", body: fields, redirect: "manual" }).catch(() => null);
    buttons.forEach((button) => (button.disabled = false));
    chosen.focus();
    const isNoted = answer?.type === "opaqueredirect";
    if (isNoted) buttons.forEach((button) => button.setAttribute("aria-pressed", String(button === chosen)));
    form.querySelector("output").textContent = isNoted ? "" : "That was not noted; load the page again.";
  });
